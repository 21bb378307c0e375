"""Reranking by Reverse Reward: candidates in, the same candidates in order of their reward out."""
