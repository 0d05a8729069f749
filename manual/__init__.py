"""The manual: its generated pages, and the site that is built of all pages.

``python -m manual`` compares the pages in ``docs/reference`` with what the code says, ``python -m manual --write``
writes them, and ``python -m manual --site`` builds the site.
"""
