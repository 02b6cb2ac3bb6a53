"""Train a recipe, stage by stage."""
