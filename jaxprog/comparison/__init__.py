"""Comparisons at equal cost: of strategies, of hand-overs, of the ladder."""
