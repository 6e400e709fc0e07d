"""StoryWeaver (arXiv 2412.07375, AAAI 2025) and the customisation methods that it is compared with."""
