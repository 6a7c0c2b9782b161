"""Where it runs and what travels: layouts, worlds, plans, model shapes. Never imports torch."""
