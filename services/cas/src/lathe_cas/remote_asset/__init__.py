"""The Remote Asset API: content by address. Loaded only where it is configured."""
