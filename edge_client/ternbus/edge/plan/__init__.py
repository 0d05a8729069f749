"""Values of a training plan: the plan with its bounds, schedules, differential privacy, tensors by name."""
