"""What several ops use. Imports torch alone; its Triton pieces also triton."""
