"""What deploy is made of: a pinned checkpoint, the ingress, what is live. Imports nothing here on purpose."""
