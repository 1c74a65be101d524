"""One class per gRPC service that the CAS offers."""
