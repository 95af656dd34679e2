"""The nouns every room shares: frozen, validated records and the definitions of balance."""
