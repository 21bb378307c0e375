"""Everything that touches Megatron's insides: the CPU engine, our flags, the presets."""
