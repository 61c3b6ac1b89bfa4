"""The command line `dafne-federated`."""
