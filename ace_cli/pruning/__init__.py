"""The one loop over the blocks, what it observes, and what it does to each slot."""
