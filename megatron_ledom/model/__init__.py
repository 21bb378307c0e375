"""The network: Megatron's GPT model with our layer specification and loss."""
