"""One class per gRPC service that the scheduler offers."""
