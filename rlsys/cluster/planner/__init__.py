"""What a run will need, take and cost, from its configuration and tables alone: ``rlsys plan``."""
