"""Reports as one HTML file: what a page is made of (`page`), its plots (`plots`) and example images (`images`)."""
