"""Chains of other libraries over our index and our gateway, each a page that runs: `make setup-chains` first."""
