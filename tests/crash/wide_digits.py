"""The digits with a model so wide that an update in small frames has more parts than may be sent without a grant."""

from dataclasses import replace

from ternbus.edge.tasks import digits_numpy

TASK = replace(digits_numpy.TASK, name="wide-digits", hidden=3072)
