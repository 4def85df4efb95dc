"""The paged KV cache: allocation of pages, and page tables, lengths and slots of sequences."""
