"""Clients of Lathe's own services, for the services that stand in front of them."""
