"""The methods a user would pick instead, each on all parameters of the model, with its source."""
