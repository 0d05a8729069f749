"""Examples of user-defined tasks; `--task examples.NAME:TASK` selects one."""
