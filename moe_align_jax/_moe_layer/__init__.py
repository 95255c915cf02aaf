"""The expert layer: what it consists of for which size, the weighted sum of experts, checkpoints' layouts."""
