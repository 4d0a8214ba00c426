//! `swiglu-tune doctor` where something is not as it should be.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use home::{Home, SHIPPED};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use std::fs;
use std::process::Command;

/// One check of `doctor --json`: whether it is well, and what was found.
fn check(home: &Home, what: &str, variables: &[(&str, &str)]) -> (bool, String) {
    let output = home.command().args(["doctor", "--json"]).envs(variables.iter().copied()).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&output.stderr));
    let checks: Value = serde_json::from_slice(&output.stdout).unwrap();
    let check = checks.as_array().unwrap().iter().find(|check| check["what"] == what).unwrap();
    (check["ok"].as_bool().unwrap(), check["found"].as_str().unwrap().to_owned())
}

/// A folder with a library that has the name and one function of its own.
fn stub(home: &Home, name: &str) -> String {
    let text = home.write("stub.cpp", "extern \"C\" int stub() { return 0; }\n");
    let folder = home.path().join(format!("of-{name}"));
    fs::create_dir(&folder).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let compiled = Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(folder.join(name)).arg(text).output();
    assert!(compiled.unwrap().status.success(), "a C++ compiler is needed, `apt install g++`");
    folder.display().to_string()
}

#[test]
fn a_library_without_its_functions_is_as_none() {
    let home = Home::new();
    for (name, what, symbol) in [
        ("libcuda.so.1", "driver", "cuInit"),
        ("libcuda.so", "driver", "cuInit"),
        ("libnvrtc.so.13", "NVRTC", "nvrtcVersion"),
    ] {
        let folder = stub(&home, name);
        let path = format!("{folder}/{name}");
        // Of NVRTC the file itself is named: one that is installed would be found before the loader path.
        let (ok, found) = check(&home, what, &[("LD_LIBRARY_PATH", &folder), ("SWIGLU_NVRTC", &path)]);
        assert!(!ok && found.contains(name) && found.contains(symbol), "{name}: {found}");
    }
    let folder = stub(&home, "libcublasLt.so");
    let (ok, found) = check(&home, "cuBLASLt", &[("LD_LIBRARY_PATH", &folder)]);
    assert!(ok && found.contains("no fault") && found.contains("cublasLtCreate"), "{found}");
}

#[test]
fn a_driver_without_its_functions_leaves_the_cpu_to_tune() {
    let home = Home::new();
    let (shapes, folder) = (home.shapes("[1]"), stub(&home, "libcuda.so.1"));
    for gpu in ["cpu", "auto"] {
        let tuned = ["--gpu", gpu, "--quiet", "--shapes", &shapes];
        home.command()
            .args(tuned)
            .env("LD_LIBRARY_PATH", &folder)
            .assert()
            .success()
            .stderr(contains("panicked").not());
    }
}

#[test]
fn a_snapshot_that_is_not_of_the_journal_is_said_with_its_remedy() {
    let home = Home::new();
    assert!(check(&home, "database", &[]).0, "nothing is no fault");
    home.tune(&["db", "import", SHIPPED]).success();
    assert!(check(&home, "database", &[]).0);
    let snapshot = home.db().join("snapshot.tsv");
    let whole = fs::read(&snapshot).unwrap();
    fs::remove_file(&snapshot).unwrap();
    let remedied = |found: String, words: &str| {
        assert!(found.contains(words) && found.contains("`swiglu-tune db rebuild`"), "{found}");
    };
    let (ok, found) = check(&home, "database", &[]);
    assert!(!ok);
    remedied(found, "0 served");
    fs::write(&snapshot, &whole[..whole.len() / 2]).unwrap();
    let (ok, found) = check(&home, "database", &[]);
    assert!(!ok);
    remedied(found, "is damaged");
    home.tune(&["db", "rebuild"]).success();
    assert!(check(&home, "database", &[]).0);
    fs::remove_file(home.db().join("journal.jsonl")).unwrap();
    let (ok, found) = check(&home, "database", &[]);
    assert!(!ok);
    remedied(found, "0 have won");
}

#[test]
fn a_cache_that_cannot_be_written_is_said() {
    let home = Home::new();
    let (ok, found) = check(&home, "compiled kernels", &[]);
    let left = fs::read_dir(home.path().join("cubin")).unwrap().count();
    assert!(ok && left == 0, "{found}");
    let file = home.write("a-file", "");
    for place in [file.clone(), format!("{file}/below")] {
        let (ok, found) = check(&home, "compiled kernels", &[("SWIGLU_CUBIN_CACHE", &place)]);
        assert!(!ok && found.contains(&place) && found.contains("set SWIGLU_CUBIN_CACHE"), "{found}");
    }
}
