"""Parameter groups, optimizers, schedules and gradients."""
