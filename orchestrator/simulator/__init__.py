"""A discrete-event model of MoDM under a virtual clock. The decisions are those of ``orchestrator.decisions``."""
