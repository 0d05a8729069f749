"""The tasks that ship with Ternbus, one file each: a model, its data, and the plan that suits them."""
