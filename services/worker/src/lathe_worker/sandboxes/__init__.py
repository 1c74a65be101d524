"""The sandboxes that a worker may be configured with."""
