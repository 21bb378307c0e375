"""Megatron checkpoints to Hugging Face folders: names, tensors, configuration, files, and the proof that they agree."""
