"""Training: the providers and the forward step that are handed to Megatron's `pretrain()`."""
