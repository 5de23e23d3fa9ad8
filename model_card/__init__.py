"""The model card: ``build_card`` renders a stage's README from its files and refuses any figure not measured."""
