"""From text to Megatron's binary datasets, in either direction, with a record of what they are.

Nothing here imports torch, transformers or megatron: preprocessing starts in a fraction of a second.
"""
