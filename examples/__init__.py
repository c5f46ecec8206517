"""Programs that use the node as a stranger would."""
