//! The document as a page: no script, nothing fetched.

use std::fmt::Write;

use serde_json::Value;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;\
    color:#1b1f24;background:#fff}code,pre{font:13px/1.45 ui-monospace,monospace}\
    details{border:1px solid #d5dae0;border-radius:6px;margin:.4rem 0}summary{cursor:pointer;padding:.45rem .8rem}\
    details>div{padding:0 .8rem .6rem;border-top:1px solid #d5dae0}h2{margin:2rem 0 .4rem;font-size:1.1rem}\
    h3{font-size:.8rem;margin:1rem 0 .2rem;color:#57606a;text-transform:uppercase;letter-spacing:.05em}\
    .m{display:inline-block;min-width:4.2rem;font:700 12px ui-monospace,monospace}.POST{color:#116329}\
    .p{display:inline-block;min-width:21rem}.k{color:#57606a}div{scroll-margin-top:3rem}.GET{color:#0550ae}.DELETE{color:#a40e26}.HEAD{color:#57606a}.a{color:#57606a;margin-left:.6rem}\
    table{border-collapse:collapse;width:100%}td{border-top:1px solid #eaeef2;padding:.2rem .6rem .2rem 0;\
    vertical-align:top}tr:first-child td{border-top:0}td:first-child{white-space:nowrap;width:1%}\
    pre{background:#f6f8fa;border-radius:6px;padding:.6rem;margin:.3rem 0;overflow-x:auto}\
    @media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}pre{background:#161b22}a{color:#79c0ff}\
    details,details>div,td{border-color:#30363d}.POST{color:#7ee787}.GET{color:#79c0ff}.DELETE{color:#ff7b72}}";

/// Every operation with what it takes and answers, then the schemas that these refer to.
pub fn render(document: &Value) -> String {
    let mut page = String::new();
    let (title, about) = (escaped(text(&document["info"]["title"])), marked(text(&document["info"]["description"])));
    let _ = write!(
        page,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style><h1>{title} <small class=a>{}</small></h1><p>{about}</p>\
         <p>Machine-readable: <a href=/openapi.json>/openapi.json</a>. Keys go into \
         <code>Authorization: Bearer sk_…</code></p><h2>Operations</h2>",
        escaped(text(&document["info"]["version"]))
    );
    for (path, methods) in pairs(&document["paths"]) {
        for (method, operation) in pairs(methods).filter(|(_, operation)| operation.is_object()) {
            write_operation(document, path, &method.to_ascii_uppercase(), operation, &mut page);
        }
    }
    page.push_str("<h2>Schemas</h2>");
    for (name, schema) in pairs(&document["components"]["schemas"]) {
        let _ = write!(page, "<details><summary><code>{0}</code></summary><div id=\"{0}\">", escaped(name));
        write_schema(schema, &mut page);
        page.push_str("</div></details>");
    }
    page.push_str("</html>");
    page
}

fn write_operation(document: &Value, path: &str, method: &str, operation: &Value, page: &mut String) {
    let (path, summary) = (escaped(path), escaped(text(&operation["summary"])));
    let _ = write!(
        page,
        "<details><summary><span class=\"m {method}\">{method}</span> <code class=p>{path}</code>\
         <span class=a>{summary}</span></summary><div id=\"{}\">",
        escaped(text(&operation["operationId"]))
    );
    if operation["security"].as_array().is_some_and(Vec::is_empty) {
        page.push_str("<p>Needs no key.</p>");
    }
    let parameters = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !parameters.is_empty() {
        page.push_str("<h3>Parameters</h3><table>");
        for parameter in parameters.iter().map(|parameter| resolved(document, parameter)) {
            let (name, place) = (escaped(text(&parameter["name"])), escaped(text(&parameter["in"])));
            let about = marked(text(&parameter["description"]));
            let _ = write!(
                page,
                "<tr><td><code>{name}</code><td>{place}<td><code>{}</code> {about}",
                told(&parameter["schema"])
            );
        }
        page.push_str("</table>");
    }
    let media = &operation["requestBody"]["content"]["application/json"];
    if media.is_object() {
        let _ = write!(page, "<h3>Body</h3><p><code>{}</code></p>", told(&media["schema"]));
        for (_, example) in pairs(&media["examples"]) {
            let _ = write!(page, "<pre>{}</pre>", escaped(&format!("{:#}", example["value"])));
        }
    }
    page.push_str("<h3>Answers</h3><table>");
    for (status, answer) in pairs(&operation["responses"]) {
        let answer = resolved(document, answer);
        let kinds: Vec<String> = pairs(&answer["content"])
            .map(|(kind, media)| {
                format!("<span class=k>{}</span> <code>{}</code>", escaped(kind), told(&media["schema"]))
            })
            .collect();
        let about = escaped(text(&answer["description"]));
        let headers: Vec<String> = pairs(&answer["headers"]).map(|(name, _)| escaped(name)).collect();
        let _ = write!(
            page,
            "<tr><td><code>{status}</code><td>{about}<td>{}<br><small>{}</small>",
            kinds.join("<br>"),
            headers.join(", ")
        );
    }
    page.push_str("</table></div></details>");
}

/// The fields of an object, or whatever else the schema says.
fn write_schema(schema: &Value, page: &mut String) {
    if !schema["properties"].is_object() {
        let _ = write!(page, "<p><code>{}</code></p>", told(schema));
        return;
    }
    page.push_str("<table>");
    for (name, field) in pairs(&schema["properties"]) {
        let required = schema["required"].as_array().is_some_and(|all| all.iter().any(|other| other == name));
        let mark = if required { " *" } else { "" };
        let about = marked(text(&field["description"]));
        let _ = write!(page, "<tr><td><code>{}{mark}</code><td><code>{}</code> {about}", escaped(name), told(field));
    }
    page.push_str("</table>");
    for rule in schema["allOf"].as_array().into_iter().flatten().filter(|rule| rule["$ref"].is_null()) {
        let _ = write!(page, "<pre>{}</pre>", escaped(&rule.to_string()));
    }
}

/// A schema in few words.
fn told(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        return format!("<a href=\"#{0}\">{0}</a>", escaped(name));
    }
    if schema["contentSchema"].is_object() {
        return told(&schema["contentSchema"]);
    }
    if let Some(choices) = ["anyOf", "oneOf"].iter().find_map(|key| schema[*key].as_array()) {
        return choices.iter().map(told).collect::<Vec<_>>().join(" | ");
    }
    let mut words = match (&schema["const"], &schema["enum"], &schema["type"]) {
        (Value::Null, Value::Null, Value::Array(kinds)) => kinds.iter().map(text).collect::<Vec<_>>().join(" | "),
        (Value::Null, Value::Null, kind) => text(kind).to_owned(),
        (Value::Null, Value::Array(all), _) => all.iter().map(Value::to_string).collect::<Vec<_>>().join(" | "),
        (value, _, _) => value.to_string(),
    };
    for (name, short) in [
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("minLength", "characters ≥"),
        ("maxLength", "characters ≤"),
        ("minItems", "items ≥"),
        ("maxItems", "items ≤"),
        ("maxProperties", "pairs ≤"),
        ("pattern", "like"),
    ] {
        match &schema[name] {
            Value::Null => {}
            bound => {
                let bound = bound.as_str().map_or_else(|| bound.to_string(), str::to_owned);
                let _ = write!(words, ", {short} {bound}");
            }
        }
    }
    let mut told = escaped(&words);
    if schema["items"].is_object() {
        told += &format!(" of {}", self::told(&schema["items"]));
    }
    let inner: Vec<String> =
        pairs(&schema["properties"]).map(|(name, field)| format!("{}: {}", escaped(name), self::told(field))).collect();
    if !inner.is_empty() {
        told += &format!(" {{ {} }}", inner.join(", "));
    }
    told
}

fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let target = value["$ref"].as_str().and_then(|reference| document.pointer(reference.trim_start_matches('#')));
    target.unwrap_or(value)
}

fn pairs(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// With what stands between backticks as code.
fn marked(text: &str) -> String {
    let pieces = escaped(text).split('`').map(str::to_owned).collect::<Vec<_>>();
    let mark = |(i, piece): (usize, &String)| if i % 2 == 1 { format!("<code>{piece}</code>") } else { piece.clone() };
    pieces.iter().enumerate().map(mark).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
