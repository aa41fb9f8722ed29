"use strict";
// openapi.json as text: every operation with what it takes and gives. Needs nothing from elsewhere.

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
    const about = part.description ? element("small", ` ${part.description}`) : "";
    return element("li", [...head, about, held(part) ? fields(part, schemas, depth + 1) : ""]);
  }));
}

function operation(path, method, { description, summary, parameters, requestBody, responses }, schemas) {
  const parts = [element("h2", [element("code", `${method.toUpperCase()} ${path}`)]), element("p", description || summary || "")];
  for (const { name, schema, description: about } of parameters || []) {
    parts.push(element("p", [element("code", name), ` ${typeOf(schema, schemas)}, default ${schema.default}. ${about || ""}`]));
  }
  for (const [type, { schema }] of Object.entries(requestBody?.content || {})) {
    parts.push(element("h3", `takes ${type}`), fields(schema, schemas));
  }
  for (const [status, { description: about, content }] of Object.entries(responses)) {
    const [type, body] = Object.entries(content || {})[0] || [];
    if (status === "422" && path === "/v1/poses") continue; // FastAPI's own; ours are problems
    parts.push(element("h3", `${status === "default" ? "otherwise" : status} ${type || ""} `));
    parts.push(element("p", about === "Successful Response" ? "" : about || ""), fields(body?.schema, schemas));
  }
  return element("section", parts);
}

fetch("openapi.json").then((response) => response.json()).then(({ paths, components }) => {
  const sections = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, given]) => operation(path, method, given, components.schemas)));
  document.getElementById("operations").replaceChildren(...sections);
}).catch(() => document.getElementById("operations").replaceChildren("openapi.json cannot be read: reload in a moment."));
