//! Writes the bindings of a C header: `bindings HEADER OUTPUT`.

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [header, output] = args.as_slice() else {
        eprintln!("usage: bindings HEADER OUTPUT");
        std::process::exit(2);
    };
    let bindings = bindgen::Builder::default()
        .header(header)
        .allowlist_file(format!(".*{header}"))
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .use_core()
        .layout_tests(true)
        .derive_default(false)
        .raw_line(format!("// Made from {header} by tools/regenerate_bindings.sh; do not edit."))
        .disable_header_comment()
        .generate_comments(false)
        .formatter(bindgen::Formatter::None)
        .generate()
        .expect("the header can be read");
    bindings.write_to_file(output).expect("the output can be written");
}
