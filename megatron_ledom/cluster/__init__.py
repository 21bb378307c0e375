"""A job before it trains: what it will need, its layout proven, its nodes checked by name."""
