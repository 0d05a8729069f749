"""The built-in tasks, one file each: a model, its data, and a default plan."""
