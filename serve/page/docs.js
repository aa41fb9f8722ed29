"use strict";
// openapi.json as text: every operation with what it takes and gives. Needs nothing from elsewhere.

// `names` of a description as code.
const words = (text) => text.split("`").map((part, i) => (i % 2 ? element("code", part) : part));

function element(tag, content) {
  const made = document.createElement(tag);
  made.append(...[content].flat().filter((part) => part !== undefined && part !== ""));
  return made;
}

function typeOf(schema, schemas) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const options = schema.anyOf || schema.oneOf;
  if (options) return options.map((option) => typeOf(option, schemas)).join(" or ");
  if (schema.type === "array") {
    if (schema.prefixItems) return `[${schema.prefixItems.map((item) => typeOf(item, schemas)).join(", ")}]`;
    return `list of ${typeOf(schema.items, schemas) || "anything"}`;
  }
  const type = [schema.type].flat().filter(Boolean).join(" or ");
  return schema.format ? `${type} (${schema.format})` : type;
}

// An object's fields, and below each the fields of the object it holds.
function fields(schema, schemas, depth = 0) {
  const held = (part) => part?.$ref || part?.items?.$ref || part?.anyOf?.map(held).find(Boolean);
  const named = held(schema) ? schemas[held(schema).split("/").pop()] : schema;
  if (!named?.properties || depth > 4) return "";
  return element("ul", Object.entries(named.properties).map(([name, part]) => {
    const optional = depth === 0 && named.required && !named.required.includes(name) ? " optional" : "";
    const head = [element("code", name), ` ${typeOf(part, schemas)}${optional}`];
    const about = part.description ? element("small", [" ", ...words(part.description)]) : "";
    return element("li", [...head, about, held(part) ? fields(part, schemas, depth + 1) : ""]);
  }));
}

const here = location.href.replace(/docs[^/]*$/, "");

// What to type for an operation: a form, JSON, or nothing but the address.
function curlOf(path, method, { requestBody, security }) {
  const key = security?.some((one) => one.key) ? ' -H "Authorization: Bearer $KEY"' : "";
  if (method === "get") return `curl${key} ${here}${path.slice(1)}`;
  const out = path.endsWith("overlay") ? " -o poses.png" : "";
  const start = `curl${key}`, to = `${here}${path.slice(1)}${out}`;
  return [
    `${start} -F image=@photo.jpg -F 'boxes=[[120, 80, 200, 400]]' ${to}`,
    `${start} -F image=@photo.jpg '${to}?boxes_from=auto'`,
    `${start} -F image=@a.jpg -F image=@b.jpg -F 'boxes=[[[120, 80, 200, 400]], null]' ${to}`,
    `${start} -H 'Content-Type: application/json' -d '${JSON.stringify(requestBody.content["application/json"].example)}' ${to}`,
  ].slice(0, out ? 1 : 4).join("\n\n");
}

function operation(path, method, given, schemas) {
  const { description, summary, parameters, requestBody, responses } = given;
  const parts = [element("h2", [element("code", `${method.toUpperCase()} ${path}`)]), element("p", words(description || summary || ""))];
  parts.push(element("pre", curlOf(path, method, given)));
  for (const { name, schema, description: about } of parameters || []) {
    const values = schema.enum ? schema.enum.join(", ") : typeOf(schema, schemas);
    parts.push(element("p", [element("code", `?${name}`), ` ${values}, ${schema.default === undefined ? "optional" : `default ${schema.default}`}. `, ...words(about || "")]));
  }
  for (const [type, { schema }] of Object.entries(requestBody?.content || {})) {
    parts.push(element("h3", `takes ${type}`), fields(schema, schemas));
  }
  const [[type, body] = []] = Object.entries(responses["200"].content || {});
  parts.push(element("h3", `answers ${type}`));
  for (const option of body.schema?.anyOf || [body.schema]) {
    parts.push(element("p", element("small", typeOf(option, schemas))), fields(option, schemas));
  }
  for (const [name, { value }] of Object.entries(body.examples || {})) {
    parts.push(details(`an example, ${name}`, element("pre", JSON.stringify(value, null, 1))));
  }
  const others = Object.keys(responses).filter((status) => status !== "200");
  parts.push(element("p", element("small", `Otherwise a problem: ${others.join(", ")}.`)));
  if (requestBody) parts.push(details("try it", tryIt(path, parameters || [])));
  return element("section", parts);
}

function details(title, content) {
  return element("details", [element("summary", title), content]);
}

function field(title, properties, tag = "input") {
  const input = Object.assign(document.createElement(tag), properties);
  return [element("label", [`${title} `, input]), input];
}

// A form that asks this server.
function tryIt(path, parameters) {
  const form = document.createElement("form"), result = document.createElement("div");
  result.setAttribute("aria-live", "polite");
  const [imageField, image] = field("picture", { type: "file", accept: "image/*", required: true, multiple: !path.endsWith("overlay") });
  const [boxesField, boxes] = field("boxes", { type: "text", placeholder: "[[x, y, w, h]], or nothing" });
  const [keyField, key] = field("key, if one is asked for", { type: "password", autocomplete: "off", value: sessionStorage.getItem("key") || "" });
  const queries = parameters.map(({ name, schema }) => {
    const [label, input] = field(name, schema.enum ? {} : { type: "text", value: schema.default ?? "" }, schema.enum ? "select" : "input");
    for (const value of schema.enum || []) input.append(element("option", value));
    return { name, label, input };
  });
  const button = element("button", "Send");
  form.append(imageField, boxesField, ...queries.map(({ label }) => label), keyField, button);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = new FormData();
    for (const file of image.files) body.append("image", file, file.name);
    if (boxes.value.trim()) body.append("boxes", boxes.value);
    const query = new URLSearchParams(queries.map(({ name, input }) => [name, input.value]).filter(([, value]) => value));
    if (key.value) sessionStorage.setItem("key", key.value);
    const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
    button.disabled = true;
    const started = performance.now();
    try {
      const response = await fetch(`${here}${path.slice(1)}?${query}`, { method: "POST", body, headers });
      const blob = await response.blob(), ms = Math.round(performance.now() - started);
      const shown = blob.type === "image/png"
        ? Object.assign(document.createElement("img"), { src: URL.createObjectURL(blob), alt: "the picture with its poses" })
        : element("pre", pretty(await blob.text()));
      result.replaceChildren(element("p", `${response.status} in ${ms} ms`), shown);
    } catch {
      result.replaceChildren(element("p", "The server does not answer."));
    } finally {
      button.disabled = false;
    }
  });
  return element("div", [form, result]);
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 1);
  } catch { // a proxy's own words
    return text.slice(0, 2000);
  }
}

function table(head, rows) {
  const cells = (tag, row) => element("tr", row.map((cell) => element(tag, String(cell))));
  return element("table", [element("thead", cells("th", head)), element("tbody", rows.map((row) => cells("td", row)))]);
}

function about(info) {
  const limits = Object.entries(info["x-limits"]).map(([name, value]) => [name.replaceAll("_", " "), value.toLocaleString("en")]);
  const problems = info["x-problems"].map(({ status, slug, title }) => [status, slug, title]);
  return [
    element("section", [element("h2", "Limits"), table(["", "of this endpoint"], limits)]),
    element("section", [
      element("h2", "Problems"),
      element("p", ["Errors are ", element("code", "application/problem+json"), " of type ", element("code", "urn:hrnet:problem:SLUG"),
        ". 408, 429 and 503 may be sent again, after Retry-After seconds where that is said."]),
      table(["status", "slug", ""], problems),
    ]),
  ];
}

fetch("openapi.json").then((response) => response.json()).then(({ info, paths, components }) => {
  const sections = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, given]) => operation(path, method, given, components.schemas)));
  document.getElementById("operations").replaceChildren(...sections, ...about(info));
}).catch(() => document.getElementById("operations").replaceChildren("openapi.json cannot be read: reload in a moment."));
