"""The model of a run: catalog, encoder and loss together, and how it is measured."""
