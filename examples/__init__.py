"""Tasks of one's own: each is a module that `--task examples.NAME:TASK` names."""
