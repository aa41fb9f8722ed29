"""Shipped configurations: plain YAML, the first line of each says what to expect from it."""
