"""A job's nodes before it trains on them: health, speed against each other, data, disk, configuration."""
