"""Files written whole or not at all, and the folder of caches."""
