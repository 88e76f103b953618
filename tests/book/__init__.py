"""The book's tools, each held to what it promises on small books made for the purpose."""
