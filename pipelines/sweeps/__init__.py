"""What a sweep is made of: the values of its trials, what came of them, who goes on."""
