"""RankCLIP (arXiv 2404.09387) and what it is compared with: CLIP, CyCLIP, ALIP."""
