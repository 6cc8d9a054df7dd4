"""k-diffusion"""
