"""Entry into other people's registries; each module needs its host and registers when imported."""
