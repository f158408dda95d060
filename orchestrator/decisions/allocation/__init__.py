"""How many workers are large: policies as pure functions of a snapshot. ``registry.allocate`` picks one by name."""
