"""The store: immutable packs (the truth), a view of plain ``.npy`` files, the index. It knows keys and arrays only."""
