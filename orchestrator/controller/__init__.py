"""The rate controller: observe, decide (in ``orchestrator.decisions``), act. Level-triggered: state, not commands."""
